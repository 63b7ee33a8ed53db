"""One short rule for each operation that is linear in a weight. Importing this registers them."""

from flax_tied_lora._interpreter.rules import collectives as collectives
from flax_tied_lora._interpreter.rules import control as control
from flax_tied_lora._interpreter.rules import experts as experts
from flax_tied_lora._interpreter.rules import joining as joining
from flax_tied_lora._interpreter.rules import layout as layout
from flax_tied_lora._interpreter.rules import lookup as lookup
from flax_tied_lora._interpreter.rules import loops as loops
from flax_tied_lora._interpreter.rules import passing as passing
from flax_tied_lora._interpreter.rules import projection as projection
from flax_tied_lora._interpreter.rules import scaling as scaling
