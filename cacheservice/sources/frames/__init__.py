"""The form of snapshots outside of a process: in files, and on their way to other processes."""
