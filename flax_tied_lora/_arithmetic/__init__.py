"""Rooms of `arithmetic`.

`ranks`: plans and factors of another rank, and what two `Adapted` must share to be used together.
`lowrank`: the closest product of a rank. `combining` and `extraction`: what their names say.
"""
