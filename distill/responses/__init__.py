"""Who answers the prompts: the target itself on this machine, or a server that runs it. One module per way.

Responses are always the target's own words: a draft is trained on what the target says, not on what a data set says.
"""
