"""Off-policy agents, each whole in one file: ``act`` and ``update(batch) -> metrics``."""
