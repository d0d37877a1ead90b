"""What every settings model has in common."""

from pydantic import BaseModel, ConfigDict


class SettingsModel(BaseModel):
    """Frozen, strict about names: a misspelt key is an error before anything starts."""

    # What is written under a field describes it in docs/configuration.md too.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
