"""What adapter operations cost, as ratios to a reference that is timed in the same rounds.

`peftkit bench` and the scripts in benchmarks/ are one system: a measurement (`step`, `ops`, `operators`, `models`,
`model_step`) returns a `Row`, a `Runner` takes measurements one by one and writes their rows into a file of one
schema (`rows`), and `report` shows rows. `cases` and `networks` are what is measured on, `peers` the same in other
libraries, `timing` the clock, `script` the command line of the scripts in benchmarks/.
"""
