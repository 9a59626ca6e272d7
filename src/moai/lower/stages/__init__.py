"""The stages of a pipeline: one step's code cut into the code of each device along "pp", which has one or several.

In: placed instructions, with their loops. Out: each device's own instructions, which exchange messages.

`units` says what can be given to a stage, `cut` and `following` where the forward is cut, `assign` which stage has
what, `late_sums` adds up what weights owe to several stages, `messages` lets devices exchange values, `parts` makes the
parts of a pass, which `weights` splits further, `schedule` orders these, `arrivals` numbers the messages. `mail` and
`exchange_check` look at what came of it.
"""
