"""The type checker of the tests: beartype, with numbers as type hints mean them (an int will do where a float is asked for)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
