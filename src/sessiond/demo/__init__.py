"""`python -m sessiond.demo`: what sessiond promises, shown with a real daemon, a real SIGKILL and a deleted disk.

Where to read: `show` has the steps in order, `season` and ../data the conversations, `picture` the SVG at the end. It
measures what a client sees, rounds nothing up, and exits with 1 if a promise was not kept.
"""
