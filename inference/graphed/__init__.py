"""Rounds of fixed shapes, captured once and replayed: what a GPU needs, where a round run kernel by kernel is nearly
all launches.

`target` runs a target of lean layers over buffers of fixed size, `contexts` holds what a draft has read in such
buffers, `rounds` makes a round of both (draft, verify, accept, read) and captures it, `decode` answers requests by
replaying it one after another, `growing` those of a published pair, whatever their length, `engine` many at once,
`responses` those of a corpus with what training needs of the target; `timing` says what replays take, `arms` which
targets and drafts can be captured, `asked` whether they are wanted. Without a GPU the same rounds run uncaptured,
which is how tests compare them with `inference.decoder`.
"""
