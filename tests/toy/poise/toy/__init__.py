"""A domain with one tiny method, for the tests of the command line and of resume."""
