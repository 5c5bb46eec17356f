"""The routes of OpenAI's API (https://platform.openai.com/docs/api-reference), with steering beside them."""
