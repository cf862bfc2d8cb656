"""Speed, memory and accuracy of every op beside its peers: ``python -m bench --help``."""
