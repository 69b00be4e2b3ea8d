"""Images with class labels: digits, folders, torchvision sets, and the prompt templates that go with them."""
