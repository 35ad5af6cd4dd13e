"""Other systems' names in recipes: TRL's, verl's, ms-swift's and others', translated into ours before validation.

The names and what they mean are data: `peers.yaml` (who is spoken, its defaults, its choice of method) and `names.yaml`
(one entry a meaning). Left out: names that nobody here has read in the other system's source; they are unknown keys.
"""

from opdkit.aliases.translate import Translation, translate

__all__ = ["Translation", "translate"]
