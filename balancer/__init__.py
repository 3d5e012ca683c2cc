"""A load balancer for HTTP and TCP. Modules import from lower floors only; `tests/test_floors.py` has the table."""

__version__ = "0.1.0"
