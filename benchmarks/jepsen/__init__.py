"""Money that moves between tables, faults of every kind, and readers that must never see a sum that never existed.

Writers move money between two tables of a group, and within single tables, so that every sum is constant; a clock in
each table is moved by one transaction for all. Two services read them, one from the primary and one from its standby
where there is one: by deltas, by full reads, and by probes. Meanwhile sessions are ended during reads, the servers
are restarted and frozen, the services are killed and start from their saved files, and the standby is promoted.

A reader over RESP asks for a group in one MULTI, a reader over HTTP for one dataset. Each answer is checked: its sum,
each row against what writers wrote, one moment for a group, generations that never go back and never change, an age
that is not understated, and a write that CACHE.WAIT confirmed. Rows that were lost at a promotion are known as such.

    python -m benchmarks.jepsen --minutes 60 --seed 1 --report jepsen.json
"""
