# SPDX-License-Identifier: Apache-2.0
"""``attncache store``: the commands about a store of shards on a Ray cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from attncache_vllm.cli.common import JsonOption, app, err, out, user_errors
from attncache_vllm.errors import StoreError

if TYPE_CHECKING:
    from attncache_vllm.store.ray.cluster import Cluster
    from attncache_vllm.store.ray.moving import Moved
    from attncache_vllm.store.ray.settings import ClusterSettings

store_app = typer.Typer(
    no_args_is_help=True,
    help="Keep the maps of a fleet of servers in shards on a Ray cluster.",
)
app.add_typer(store_app, name="store")

ConfigOption = Annotated[
    Path, typer.Option(help="Settings of the cluster, like `configs/ray-local.yaml`.")
]
AnyConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Settings of the cluster to take the address from.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="`auto`, `HOST:PORT` or `ray://HOST:PORT`, in place of settings."),
]
EditionOption = Annotated[
    str | None, typer.Option(help="Beginning of the digest of an edition, see `store status`.")
]


@store_app.command()
def up(config: ConfigOption) -> None:
    """Start or join a Ray cluster and start the shards that are not there.

    Shards outlive this command, are restarted when they end, and come back with their entries.

    Example: `attncache store up --config configs/ray-local.yaml`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster

        settings = _settings(config)
        if settings.address == "local":
            cluster.start_head(settings)
        with _joined(settings, None):
            running = cluster.up(settings)
            entries = running.fanout.figures()["entries"]
    address = "ray:auto" if settings.address == "local" else _store_address(settings.address)
    out.print(f"{settings.shards} shards with {entries} entries; servers: `store: {address}`")


@store_app.command()
def status(
    config: AnyConfigOption = None, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """Show shards, what they hold, and the editions. Exit code 1 if a shard does not answer.

    Example: `attncache store status --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster

        with _attached(config, address) as running:
            found = cluster.status(running)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        placement = found["placement"]
        table = Table(
            title=f"{placement['shards']} shards, {placement['replicas']} replicas, drained: "
            f"{placement['drained'] or 'none'}"
        )
        columns = ("entries", "bytes", "max_bytes", "tenants", "evicted", "expired", "damaged")
        for name in ("shard", "node", *columns):
            table.add_column(name)
        for shard in found["shards"]:
            if shard["answers"]:
                figures = (str(shard[name]) for name in columns)
                table.add_row(str(shard["shard"]), shard["node"][:12], *figures)
            else:
                table.add_row(str(shard["shard"]), shard["reason"])
        out.print(table)
        for digest, about in sorted(found["editions"].items()):
            state = "current" if about["current"] else "superseded"
            copies = f"{about['copies']} copies of entries"
            out.print(f"edition {digest[:16]} of {about['model']}: {state}, {copies}")
    if not all(shard["answers"] for shard in found["shards"]):
        raise typer.Exit(1)


@store_app.command()
def load(
    folder: Annotated[Path, typer.Argument(help="Folder of an embedded store.")],
    config: AnyConfigOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish what an embedded store has, and copy its entries into the shards.

    They are for requests without a `cache_salt`. What is there already is known and not sent again.

    Example: `attncache store load ./maps --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import transfer

        with _attached(config, address) as running, Progress(console=err) as progress:
            task = progress.add_task("entries", total=None)

            def report(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            outcome = transfer.load(running.fanout, folder, report)
    if as_json:
        typer.echo(json.dumps(outcome, indent=2))
    else:
        out.print(", ".join(f"{count} {name}" for name, count in outcome.items()))
    if outcome["refused"]:
        err.print("warning: a shard that should hold a refused entry is full, or did not answer")


@store_app.command()
def save(
    folder: Annotated[Path, typer.Argument(help="Folder of the embedded store to be made.")],
    config: AnyConfigOption = None,
    address: AddressOption = None,
    edition: EditionOption = None,
) -> None:
    """Make an embedded store of an edition and of the entries without a tenant.

    Example: `attncache store save ./copy --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import transfer

        with _attached(config, address) as running:
            saved = transfer.save(running.fanout, folder, edition)
    out.print(f"{saved} entries in {folder}")


@store_app.command()
def reshard(config: ConfigOption) -> None:
    """Have as many shards and replicas as the settings say, and lose nothing. Lookups go on.

    With unchanged settings it makes again the copies that were lost with a shard.

    Example: `attncache store reshard --config configs/ray-cluster.yaml`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster

        settings = _settings(config)
        with _attached(config, None) as running:
            moved = cluster.reshard(running, settings, err.print)
    _print_moved(moved)


@store_app.command()
def drain(
    shard: Annotated[list[int] | None, typer.Option(help="A shard; may be repeated.")] = None,
    node: Annotated[
        str | None, typer.Option(help="All shards on the node whose id begins like this.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Use all shards again.")] = False,
    config: AnyConfigOption = None,
    address: AddressOption = None,
) -> None:
    """Move all entries off some shards, before their node goes down for maintenance.

    They then hold nothing and are not asked. Shards that were drained before come back.

    Example: `attncache store drain --node 3f2a --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster

        if sum((bool(shard), node is not None, back)) != 1:
            raise StoreError(
                "drain needs one of --shard, --node and --back, "
                f"got shards {shard!r}, node {node!r}, back {back!r}"
            )
        with _attached(config, address) as running:
            chosen = cluster.shards_on(running, node) if node is not None else shard or []
            moved = cluster.drain(running, chosen, err.print)
    _print_moved(moved)


@store_app.command()
def delete(
    tenant_salt: Annotated[
        str | None, typer.Option(help="The `cache_salt` of the tenant whose entries go.")
    ] = None,
    edition: EditionOption = None,
    config: AnyConfigOption = None,
    address: AddressOption = None,
) -> None:
    """Delete the entries of a tenant, of an edition, or of the one in the other.

    Servers keep maps in memory that they have loaded before, until these are evicted there.

    Example: `attncache store delete --tenant-salt customer-7 --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster
        from attncache_vllm.tenants import tenant_of

        if tenant_salt is None and edition is None:
            raise StoreError("delete needs --tenant-salt, --edition or both, got neither")
        tenant = None if tenant_salt is None else tenant_of(tenant_salt)
        with _attached(config, address) as running:
            deleted = cluster.delete(running, tenant, edition)
    out.print(f"{deleted} copies of entries deleted")


@store_app.command()
def rearm(config: AnyConfigOption = None, address: AddressOption = None) -> None:
    """Let the servers of the shards try again the layers that their canaries have switched off.

    Example: `attncache store rearm --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster

        with _attached(config, address) as running:
            cluster.rearm(running)
    out.print("servers of this store look for it every few dozen hits")


@store_app.command()
def down(
    config: AnyConfigOption = None,
    address: AddressOption = None,
    head: Annotated[
        bool, typer.Option("--head", help="Stop everything of Ray on this machine as well.")
    ] = False,
) -> None:
    """End the shards. What they keep stays in their folders, for the next `store up`.

    Example: `attncache store down --address auto`
    """
    with _commanding(config):
        from attncache_vllm.store.ray import cluster

        with _joined(*_chosen(config, address)):
            ended = cluster.down()
        if head:
            cluster.stop_ray()
    out.print(f"{len(ended)} shards ended")


@contextmanager
def _commanding(config: Path | None) -> Iterator[None]:
    """Errors of the block in one line; and Ray, when it is imported there, finds its token."""
    with user_errors():
        try:
            settings = None if config is None else _settings(config)
            if settings is not None and settings.address == "local":
                # Ray looks at it when it is imported, and sets it itself for `auto` only.
                os.environ.setdefault("RAY_AUTH_MODE", settings.authentication)
            yield
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise StoreError(
                "a store of shards needs the package ray, got none; install attncache-vllm[ray]"
            ) from None


def _settings(config: Path) -> ClusterSettings:
    from attncache_vllm.store.ray.settings import load_cluster_settings

    return load_cluster_settings(config)


def _chosen(config: Path | None, address: str | None) -> tuple[ClusterSettings | None, str | None]:
    if (config is None) == (address is None):
        raise StoreError(f"give one of --config and --address, got {str(config)!r} and {address!r}")
    return (None if config is None else _settings(config)), address


@contextmanager
def _joined(settings: ClusterSettings | None, address: str | None) -> Iterator[None]:
    from attncache_vllm.store.ray.cluster import joined

    with joined(settings.cluster if settings is not None else str(address)):
        yield


@contextmanager
def _attached(config: Path | None, address: str | None) -> Iterator[Cluster]:
    from attncache_vllm.store.ray.cluster import attach

    with _joined(*_chosen(config, address)):
        yield attach()


def _store_address(address: str) -> str:
    return address if address.startswith("ray:") else f"ray:{address}"


def _print_moved(moved: Moved) -> None:
    out.print(f"{moved.copied} copies made, {moved.removed} removed")
    if moved.stranded:
        err.print(
            f"warning: {moved.stranded} entries found no room where they are looked for; raise "
            "shard_mib and reshard again"
        )
