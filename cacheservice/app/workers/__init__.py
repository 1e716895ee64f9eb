"""Worker processes: they serve the RESP port and the HTTP port, and the main process does everything else.

In the main process, `held` binds the ports and accepts nothing, `member` runs one worker, and `supervisor` all of them.
`__main__` is the program of a worker, and `worker` builds its parts.
"""
