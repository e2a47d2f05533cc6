"""Everything that can be set: the models, and the files they are read from. Nothing here imports torch, so that a
misspelt name is reported in a fraction of a second.
"""

from incubate_lib.config.errors import MOST_CLASSES as MOST_CLASSES
from incubate_lib.config.errors import SettingsError as SettingsError
from incubate_lib.config.errors import check_numbers as check_numbers
from incubate_lib.config.errors import error_message as error_message
from incubate_lib.config.errors import in_a_line as in_a_line
from incubate_lib.config.errors import nearest as nearest
from incubate_lib.config.errors import refuse as refuse
from incubate_lib.config.errors import validated as validated
from incubate_lib.config.files import checkout as checkout
from incubate_lib.config.files import data_folder as data_folder
from incubate_lib.config.files import load_settings as load_settings
from incubate_lib.config.files import notebooks_folder as notebooks_folder
from incubate_lib.config.files import presets as presets
from incubate_lib.config.models import DEFAULT_MACHINE as DEFAULT_MACHINE
from incubate_lib.config.models import Settings as Settings
from incubate_lib.config.phase import TASK as TASK
from incubate_lib.config.phase import PhaseSettings as PhaseSettings
from incubate_lib.config.recipes import TrainingSettings as TrainingSettings
from incubate_lib.config.sections import LARGEST_SEED as LARGEST_SEED
from incubate_lib.config.sections import MADE as MADE
from incubate_lib.config.sections import SCENES as SCENES
from incubate_lib.config.sections import DataSettings as DataSettings
from incubate_lib.config.sections import Frozen as Frozen
from incubate_lib.config.sections import MachineSettings as MachineSettings
from incubate_lib.config.sections import MATSettings as MATSettings
from incubate_lib.config.sections import ModelSettings as ModelSettings
from incubate_lib.config.sections import check_name as check_name
