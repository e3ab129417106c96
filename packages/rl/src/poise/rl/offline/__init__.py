"""Learning from a fixed log: data sets and their readers, normalised states and scores, constraints on the policy."""
