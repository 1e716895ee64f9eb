-- Run by psql -f, which repeats it until the connection is lost.
SELECT shop.breathe() \watch interval=2
