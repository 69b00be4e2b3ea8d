"""From flags to a run: data, model, plan, optimizer, resume; every fault of the input is found here."""
