"""Other libraries over the same brokers: `python -m bench.peers` (`make bench-peers`).

table.py          which libraries, in which versions, with which settings
environments.py   a virtual environment for each, under bench/results/peers
measures.py       one measure: a program in its environment
report.py         the table, the JSON, the section in docs/benchmarks.md
programs/         one program per library; each runs in its library's environment
"""
