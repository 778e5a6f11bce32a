"""Re-alignment: a published draft is trained on for the target and the traffic there are now, and replaced only by one
that is measurably faster.

`stage.run_realign` is the whole cycle; `snapshot` fixes the prompts, `cause` tells a moved target from moved traffic,
`candidates` says what is trained, `gate` decides, `measure` feeds it, `cycle` remembers.
"""
