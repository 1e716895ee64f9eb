"""Worker processes: they serve the RESP port and the HTTP port, and the main process does everything else.

In the main process, `held` binds the ports and accepts nothing, `member` runs one worker, and `supervisor` all of them;
`center` answers the workers, and adds up their counts. `__main__` is the program of a worker, `worker` builds its
parts, and `part` connects its ports with the main process.
"""
