"""Where a run's files and its data lie: folders of this machine and of Google Cloud Storage, gs://BUCKET/...

For what reads and writes whole files the two are alike (`paths`). What object storage cannot do is done otherwise
there: append to logs (`spool`), lock a folder (`claim`), map data into memory (`mirror`).
"""
