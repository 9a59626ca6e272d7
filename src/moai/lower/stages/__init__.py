"""The stages of a pipeline: one step's code cut into the code of each stage.

In: placed instructions, with their loops. Out: each stage's own instructions, which exchange messages.

`sections` says what is in which loop, `units` what can be given to a stage, `cut` where the forward is cut, `assign`
which stage has what, `late_sums` adds up what weights owe to several stages, `messages` lets stages exchange values,
`parts` splits a pass into forward and backward, `schedule` orders these.
"""
