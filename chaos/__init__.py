"""Faults on real brokers: `make chaos` runs every broker through every fault; docs/reference/faults.md has the outcome.

- `faults`: what is done to a running pipeline
- `broker`, `brokers`: the servers that it is done to, and which faults each can have
- `cell`: one broker and one fault, from the first message to the last count
- `site`: the processes of a cell and the proxies before them
- `actors`: what those processes run
- `ledger`: what they wrote down, and what it says
- `report`: the table, the JSON, the page
"""
