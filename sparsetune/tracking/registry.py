"""A registered model: its versions and aliases, which one process changes at a time."""

import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.errors import RegistryError, TrackingError, UsageError
from sparsetune.tracking.logged_model import DIGEST, log_checkpoint_model
from sparsetune.tracking.store import MissingError, Store, experiment_id, first_line, global_store, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION = "champion"
PREVIOUS = "previous"
RUN = "sparsetune.run_id"
EVALUATION = "sparsetune.evaluation_run_id"
OVERRIDE = "sparsetune.override"
"""Tags of versions: the run with the checkpoint, the evaluation it was promoted by, and reasons of overrides."""

GATE = "sparsetune.gate"
"""Tag of versions: the bounds of the gate that they were promoted under."""

TOOL = "sparsetune.tool"
"""Tag of registered models that hold versions of ours, which they are listed by."""

CLAIM = "sparsetune.claim."
CLAIM_SECONDS = 120.0
"""How long the lock of a killed process holds."""

_VERSIONS_OF_MODEL = "mlflow.modelVersions"  # MLflow's own tag: its UI links a logged model to its versions by it


class Registry:
    """One registered model of a store. Every method raises TrackingError where the registry fails."""

    def __init__(self, client: "MlflowClient", store: Store, name: str) -> None:
        self.client, self.store, self.name = client, store, name
        self.home = client
        """Client of the store that has the logged models which versions are made of."""
        if store.copies_models:
            from mlflow import MlflowClient

            self.home = MlflowClient(tracking_uri=store.registry_uri, registry_uri=store.registry_uri)

    def model(self) -> "RegisteredModel | None":
        """Read the registered model, None where there is none; raises UsageError where MLflow refuses the name."""
        try:
            with store_errors(f"read the registered model {self.name}"):
                return self.client.get_registered_model(self.name)
        except MissingError:
            return None
        except TrackingError as error:
            if (refused := _refused_name(error, "--name", self.name)) is not None:
                raise refused from error
            raise

    def aliased(self, alias: str) -> str | None:
        """Return the version that an alias names now; None where there is none."""
        model = self.model()
        return None if model is None else _text(model.aliases.get(alias))

    def version(self, version: str) -> "ModelVersion":
        with store_errors(f"read version {version} of {self.name}"):
            return self.client.get_model_version(self.name, version)

    def check_alias(self, alias: str) -> None:
        """Raise UsageError where MLflow refuses an alias, before anything is registered for it."""
        if alias.lower() == "latest":
            raise UsageError("--alias must not be latest: MLflow reserves it for the newest version; choose another")
        if re.fullmatch(r"[vV]\d+", alias):  # MLflow reads such an alias, but doesn't set it
            raise UsageError(f"--alias must not look like a version number, got {alias}; choose another")
        if alias == PREVIOUS or alias.startswith(f"{PREVIOUS}-"):
            raise UsageError(
                f"--alias must not be {alias}: `sparsetune rollback` uses it; choose another, e.g. {CHAMPION}"
            )
        try:
            with store_errors("read the alias"):
                self.client.get_model_version_by_alias(self.name, alias)
        except MissingError:
            return
        except TrackingError as error:
            refused = _refused_name(error, "--alias", alias)
            if refused is None:
                raise
            if "not found" not in str(refused):  # MLflow has the same code for an alias that isn't there
                raise refused from error

    def find(self, run_id: str, digest: str) -> "ModelVersion | None":
        with store_errors(f"read the versions of {self.name}"):
            found = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        made = [one for one in found if one.tags.get(RUN) == run_id and one.tags.get(DIGEST) == digest]
        return max(made, key=lambda one: int(one.version), default=None)

    def register(self) -> None:
        from mlflow.exceptions import MlflowException

        with store_errors(f"register the model {self.name}"):
            try:
                self.client.create_registered_model(self.name, tags={TOOL: "sparsetune"})
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
                    raise
                self.client.set_registered_model_tag(self.name, TOOL, "sparsetune")

    def create(self, run_id: str, model_id: str, tags: Mapping[str, str], description: str) -> "ModelVersion":
        """Create a version of a logged model with its tags at once, so that `find` sees it."""
        with store_errors(f"create a version of {self.name}"), global_store(self.store):
            return self.client.create_model_version(
                self.name,
                source=f"models:/{model_id}",
                run_id=run_id,
                tags=dict(tags),
                description=description,
                model_id=model_id,
            )

    def link(self, model_id: str, version: str) -> None:
        """Link a logged model's page to a version of it."""
        with store_errors(f"write to the logged model {model_id}"):
            known = json.loads(self.home.get_logged_model(model_id).tags.get(_VERSIONS_OF_MODEL, "[]"))
            entry = {"name": self.name, "version": version}
            if entry not in known:
                self.home.set_logged_model_tags(model_id, {_VERSIONS_OF_MODEL: json.dumps([*known, entry])})

    def set_alias(self, alias: str, version: str) -> None:
        with store_errors(f"set the alias {alias} of {self.name} to version {version}"):
            self.client.set_registered_model_alias(self.name, alias, version)

    def set_tag(self, version: str, key: str, value: str) -> None:
        with store_errors(f"set the tag {key} of version {version} of {self.name}"):
            self.client.set_model_version_tag(self.name, version, key, value)

    def expect(self, alias: str, version: str | None) -> None:
        """Raise RegistryError where an alias was moved since the comparison."""
        now = self.aliased(alias)
        if now != version:
            raise RegistryError(
                f"{self.name}@{alias} changed from {_named(version)} to {_named(now)} during the comparison: somebody "
                "else promoted or rolled back; promote again"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the model's aliases; raises RegistryError where somebody else holds the lock.

        MLflow has no compare-and-set for aliases. So each process first writes a tag of its own to the registered
        model and then reads the others': of two at once at least one sees the other, and fails. The tag of a killed
        process expires at once on its own host, and elsewhere after `CLAIM_SECONDS`: by its time, or where that is of
        a clock ahead, by waiting so long.
        """
        mine = f"{CLAIM}{uuid.uuid4().hex}"
        with store_errors(f"write to {self.name}"):
            claim = f"{time.time():.0f} {socket.gethostname()}:{os.getpid()}"
            self.client.set_registered_model_tag(self.name, mine, claim)
        try:
            others = self._claims()
            end = time.monotonic() + CLAIM_SECONDS
            while any(_age(value) < -CLAIM_SECONDS for value in others.values()) and time.monotonic() < end:
                time.sleep(1.0)
                others = self._claims()
            if any(key != mine and abs(_age(value)) < CLAIM_SECONDS for key, value in others.items()):
                raise RegistryError(
                    f"another promotion or rollback of {self.name} is in progress; try again later (one that was "
                    f"killed expires after {CLAIM_SECONDS:g} s)"
                )
            yield
            for key in others.keys() - {mine}:
                self._release(key)
        finally:
            self._release(mine)

    def _claims(self) -> dict[str, str]:
        model = self.model()
        return {key: value for key, value in (model.tags if model else {}).items() if key.startswith(CLAIM)}

    def _release(self, claim: str) -> None:
        try:
            with store_errors(f"write to {self.name}"):
                self.client.delete_registered_model_tag(self.name, claim)
        except MissingError:
            pass  # another process removed an expired one


def open_registry(client: "MlflowClient", store: Store, model: str, name: str | None = None) -> Registry:
    """Open the registered model of a name; UsageError where a filter or a `models:/` URI can't hold the name."""
    name = name or f"{model}-sparse"
    if not re.fullmatch(r"\w[\w .()+-]{0,199}", name):
        raise UsageError(
            f"--name must begin with a letter or digit and have only letters, digits, spaces and -_.()+, got {name!r}; "
            "choose another"
        )
    return Registry(client, store, name)


def previous_alias(alias: str) -> str:
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"


def first_tag(alias: str) -> str:
    """Tag of versions: the first version that the alias named since the gate was last changed."""
    return f"sparsetune.first.{alias}"


def _age(claim: str) -> float:
    """Return a claim's age in seconds; infinite where its process died on this host, or it can't be read."""
    made, _, process = claim.partition(" ")
    host, _, number = process.rpartition(":")
    try:
        if host == socket.gethostname():
            with suppress(PermissionError):  # another user's, which lives
                os.kill(int(number), 0)
        return time.time() - float(made)
    except (ValueError, OverflowError, ProcessLookupError):
        return math.inf


def _refused_name(error: BaseException, option: str, name: str) -> UsageError | None:
    cause = error.__cause__ or error
    if getattr(cause, "error_code", None) != "INVALID_PARAMETER_VALUE":
        return None
    return UsageError(f"MLflow rejects {option} {name!r}: {first_line(cause)} Choose another")


def _text(version: object) -> str | None:
    return None if version is None else str(version)


def _named(version: str | None) -> str:
    return "nothing" if version is None else f"version {version}"


ORIGIN = "sparsetune.copy_of"
"""Tag of a run on the registry's side: the run, in its own store, whose checkpoint it keeps."""


@dataclass(frozen=True)
class LoggedIn:
    """A logged model with its run, in the store that the registry looks into."""

    run_id: str
    model_id: str


def copy_checkpoint(home: "MlflowClient", store: Store, model: str, origin: str, checkpoint: Path) -> LoggedIn:
    """Log a checkpoint, some kilobytes, on the registry's server `home`, unless it is there; its run is `origin`."""
    there = replace(store, uri=store.registry_uri, artifact_root=None)
    experiment = experiment_id(home, there, f"sparsetune/{model}/registered")
    with store_errors(f"copy the checkpoint of run {origin} to the registry's server"):
        found = home.search_runs([experiment], f"tags.`{ORIGIN}` = '{origin}'", max_results=1)
        tags = {ORIGIN: origin, "sparsetune.origin_store": store.shown}
        run_id = str((found[0] if found else home.create_run(experiment, tags=tags)).info.run_id)
        logged = log_checkpoint_model(home, run_id, checkpoint)
        home.set_terminated(run_id)
    return LoggedIn(run_id, logged)
