"""What of ours equals the papers' own code: one module per kind of comparison, each a function that returns lines.

The official modules are imported from the given checkouts at run time, and their scripts run as they stand on small
random data; nothing of theirs is copied here.
"""
