"""An installation proves itself: a table of checks against the cluster that one has.  See __main__."""
