"""Tokens of texts and texts of tokens, as vLLM's server and lm-eval's client of it have them."""

from fastapi import APIRouter, Depends

from server import formatting
from server.api.body import BodyRoute
from server.api.deps import ServiceDep, require_api_key
from server.schemas import DetokenizeBody, DetokenizeRequest, TokenizeBody, TokenizeRequest, TokenizerInfoBody

router = APIRouter(tags=["tokens"], route_class=BodyRoute, dependencies=[Depends(require_api_key)])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> TokenizeBody:
    """The tokens of a text or a conversation: those that a request to generate from it would have."""
    ids = await service.tokenize(body.to_params(), body.model)
    return formatting.tokenized(service.codec, ids, names=bool(body.return_token_strs))


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> DetokenizeBody:
    """The text of tokens, special ones included."""
    return DetokenizeBody(prompt=await service.detokenize(body.tokens, body.model))


@router.get("/tokenizer_info")
def tokenizer_info(service: ServiceDep) -> TokenizerInfoBody:
    """The tokenizer's special tokens and its chat template."""
    return formatting.tokenizer_info(service.codec)
