"""How good is a policy, and how wrong is its critic?"""
