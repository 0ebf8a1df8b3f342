from mpillama.errors import UserError as UserError
from mpillama.llm import LLM as LLM
from mpillama.results import Choice as Choice
from mpillama.results import Completion as Completion
from mpillama.results import GenerationParams as GenerationParams
from mpillama.results import Logprob as Logprob
from mpillama.results import Piece as Piece
from mpillama.results import ToolCall as ToolCall

__version__: str
