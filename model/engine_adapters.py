"""The adapters of one engine: from files and bytes to slots of its bank, and to files again."""

from pathlib import Path

from model.adapter_bank import Adapter, AdapterBank, random_adapter
from model.adapter_exchange.files import export_file, import_adapter, read_content, understand
from model.adapter_file import read_adapter, write_adapter
from model.config import GemmaConfig
from model.errors import AdapterUnfit
from model.lora_adapter import Layout, LoraAdapter
from model.slots import AdapterForm


class EngineAdapters:
    """What an engine does with adapters; see `model.slots.Engine`.

    Args:
        config: Of the model.
        bank: Of the engine.
    """

    def __init__(self, config: GemmaConfig, bank: AdapterBank) -> None:
        self._config = config
        self._bank = bank
        # Those of files by their digest: to read HDF5 once more takes one more process.
        self._of_files: dict[str, Adapter] = {}

    def read(self, path: Path, digest: str) -> Adapter:
        """The adapter in files of any kind, if they are those that were named."""
        if digest not in self._of_files:
            self._of_files[digest] = self._for_bank(self._named(path, digest))
        return self._of_files[digest]

    def open(self, content: bytes) -> Adapter:
        """The adapter of a stored version."""
        return self._for_bank(read_adapter(content, self._config))

    def form(self, content: bytes) -> AdapterForm:
        """What a stored version is made of."""
        form = read_adapter(content, self._config).form
        return AdapterForm(form.layout, form.rank, form.alpha, form.targets)

    def bring_in(self, path: Path, layout: Layout) -> bytes:
        """A file of another library as a version is stored."""
        adapter = import_adapter(path, layout, self._config)
        self._for_bank(adapter)
        return write_adapter(adapter)

    def bring_in_named(self, path: Path, digest: str) -> bytes:
        """Files of any kind as a version is stored, if they are those that were named."""
        adapter = self._named(path, digest)
        self._for_bank(adapter)
        return write_adapter(adapter)

    def take_out(self, content: bytes, path: Path, layout: Layout) -> None:
        """A stored version as a file of another library."""
        export_file(read_adapter(content, self._config), path, layout, self._config)

    def put(self, slot: int, adapter: Adapter) -> None:
        """Gives a slot of the bank to an adapter."""
        self._bank.put(slot, adapter)

    def put_random(self, slot: int, rank: int) -> None:
        """For the self-test: an adapter of all projections, of the size of real ones."""
        self._bank.put(slot, random_adapter(self._config, rank, seed=slot))

    def _named(self, path: Path, digest: str) -> LoraAdapter:
        content = read_content(path, self._config)
        if content.digest != digest:
            raise AdapterUnfit(f"{path} has changed since it was named; start the service again.")
        return understand(content, self._config)

    def _for_bank(self, adapter: LoraAdapter) -> Adapter:
        in_bank = adapter.for_bank(self._config)
        self._bank.check(in_bank)
        return in_bank
