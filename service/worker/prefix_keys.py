"""Names for what a prefilled block of a prompt was made of.

A chain: the key of a block is a digest of its tokens and of the key before it. The chain begins
with everything else that shapes keys and values, and with a salt of the tenant that nobody outside
the worker knows; so one tenant can never meet, or time, the prompt of another.
"""

import hashlib
import hmac
import secrets
from array import array
from collections.abc import Sequence


class PrefixKeys:
    """Makes keys that hold as long as this process.

    Args:
        preset_digest: Of the weights.
        block_tokens: Tokens of a block.
    """

    def __init__(self, preset_digest: str, block_tokens: int) -> None:
        self._preset_digest = preset_digest
        self._block_tokens = block_tokens
        self._secret = secrets.token_bytes(32)

    def of(
        self,
        tenant: str,
        adapter: str | None,
        prompt: Sequence[int],
        interventions: bytes = b"",
    ) -> tuple[bytes, ...]:
        """Of every whole block before the prompt's last token, which is never prefilled.

        Args:
            tenant: Whose prompt it is.
            adapter: Digest of the adapter version that made the keys and values, or None.
            prompt: Token ids.
            interventions: What was changed in the prompt, in bytes; empty if nothing was.
        """
        key = self._beginning(tenant, adapter, interventions)
        keys = []
        for end in range(self._block_tokens, len(prompt), self._block_tokens):
            tokens = array("I", prompt[end - self._block_tokens : end]).tobytes()
            key = hashlib.sha256(key + tokens).digest()
            keys.append(key)
        return tuple(keys)

    def _beginning(self, tenant: str, adapter: str | None, interventions: bytes) -> bytes:
        salt = hmac.digest(self._secret, tenant.encode(), "sha256")
        adapter_digest = b"" if adapter is None else adapter.encode()
        parts = (salt, self._preset_digest.encode(), adapter_digest, interventions)
        digest = hashlib.sha256()
        for part in parts:
            # With its length in front, so that no two lists of parts are one text.
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()
