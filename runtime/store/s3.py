"""One prefix of a bucket in an object store; every transfer is verified.

Addresses and credentials are the standard variables of AWS (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …), and so is
AWS_REQUEST_CHECKSUM_CALCULATION=when_required, for stores that do not support the newer checksums.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
from botocore.config import Config

from runtime.errors import Refused, StorageFailure, WrongParameters
from runtime.store.s3errors import STORE_ERRORS, WrongAnswer, explain, operation, status_of, timeout_seconds

T = TypeVar("T")
ADDRESS = re.compile(r"s3://([^/]+)(/.*)?")
MD5 = re.compile(r"[0-9a-f]{32}")
CHUNK_BYTES = 256 << 10
MAX_PUT_BYTES = 5 << 30  # of S3: what one request may store
UPLOADS = 3  # of a file that arrives damaged
READS = 8  # of a small object, until two are equal


class ConditionFailed(Exception):
    """A conditional write was refused: the object exists, or is not the expected one."""


class NoConditions(Exception):
    """The store does not support conditional writes, and says so."""


class Prefix:
    """The objects below 's3://bucket/prefix'.  Picklable and fork-safe: every process creates its own client.

    Every method raises Unreachable when the store has not answered for VGG_S3_PATIENCE_SECONDS, and WrongParameters
    when address or credentials are refused.
    """

    def __init__(self, address: str) -> None:
        """Raises WrongParameters unless the address is s3://bucket or s3://bucket/prefix."""
        match = ADDRESS.fullmatch(address)
        if not match:
            raise WrongParameters(f"{address}: not of the form s3://bucket/prefix")
        self.bucket, self.prefix = match[1], (match[2] or "").strip("/")
        self.address = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._client: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> Any:
        if self._client is None or self._client[0] != os.getpid():
            seconds = timeout_seconds()
            config = Config(
                connect_timeout=seconds,
                read_timeout=seconds,
                retries={"total_max_attempts": 1, "mode": "standard"},
                max_pool_connections=32,
                # for a part of an object some stores send the checksum of the whole; ours are in the manifest
                response_checksum_validation="when_required",
            )
            try:
                # not the default session: two threads must not create it at once
                self._client = os.getpid(), boto3.session.Session().client("s3", config=config)
            except (*STORE_ERRORS, ValueError) as error:
                raise explain(error, self.address) from error
        return self._client[1]

    def where(self, name: str = "") -> str:
        """Address of an object and of the store, for messages."""
        return f"{self.address}/{name} at {self.client.meta.endpoint_url}"

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def make_bucket(self) -> bool:
        """Make the bucket if it does not exist.  Returns whether it was made."""

        def make() -> bool:
            try:
                self.client.head_bucket(Bucket=self.bucket)
                return False
            except STORE_ERRORS as error:
                if status_of(error)[0] != 404:
                    raise
            try:
                self.client.create_bucket(Bucket=self.bucket)
                return True
            except STORE_ERRORS as error:
                if status_of(error)[1] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
                return False  # another process was faster

        return operation(self.where()).call(make)

    def _request(self, name: str, call: Callable[[], T]) -> T:
        return operation(self.where(name)).call(call)

    def head(self, name: str) -> dict[str, Any] | None:
        """The store's metadata of an object; None if it does not exist."""
        call = {"Bucket": self.bucket, "Key": self.key(name), "ChecksumMode": "ENABLED"}
        try:
            return dict(self._request(name, lambda: self.client.head_object(**call)))
        except Refused:
            return None

    def stream(self, name: str, size: int | None = None) -> Iterator[bytes]:
        """The bytes of an object in order, in chunks.  A body that breaks off is continued where it broke.

        size: the expected number of bytes.  Raises Refused if the object is missing or of another size, StorageFailure
        if it is replaced meanwhile.
        """
        retry = operation(self.where(name))
        done, total, etag = 0, -1, ""
        while done != total:
            rest = {"Range": f"bytes={done}-", "IfMatch": etag} if done else {}
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.key(name), **rest)
                if done and not answer.get("ContentRange", "").startswith(f"bytes {done}-"):
                    raise WrongAnswer("the store does not continue a download (Range)")
                if not done:
                    total, etag = int(answer["ContentLength"]), answer["ETag"]
                    if size not in (None, total):
                        where = self.where(name)
                        raise Refused(f"{where}: has {total:,} bytes instead of {size:,}. Run its stage again.")
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    done += len(chunk)
                    retry.progress()
                    yield chunk
            except STORE_ERRORS as error:
                retry.failed(error)

    def download(self, name: str, file: BinaryIO, size: int) -> None:
        """Write an object of `size` bytes into a file.  Raises as stream() does."""
        for chunk in self.stream(name, size):
            file.write(chunk)

    def fetch(self, entry: dict[str, Any], file: BinaryIO) -> None:
        """Write the object of a manifest entry into a file; the caller checks its checksum."""
        self.download(entry["path"], file, entry["size"])

    def get(self, name: str) -> bytes | None:
        """A small object, whole; None if it does not exist."""
        data, _ = self.get_with_answer(name)
        return data

    def get_with_answer(self, name: str) -> tuple[bytes | None, dict[str, Any]]:
        """A small object and the store's answer.

        The ETag is usually the MD5 of the object; where it is not, two equal reads are the check.
        """

        def once() -> tuple[bytes, dict[str, Any]]:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key(name))
            return answer["Body"].read(), answer

        before = None
        for _ in range(READS):
            try:
                data, answer = self._request(name, once)
            except Refused:
                return None, {}
            if data == before or hashlib.md5(data, usedforsecurity=False).hexdigest() == answer["ETag"].strip('"'):
                return data, answer
            before = data
        raise StorageFailure(f"{self.where(name)}: every read gives other bytes. Check store and network.")

    def put_bytes(self, name: str, data: bytes, condition: dict[str, str] | None = None) -> str:
        """Store a small object and return its ETag.  condition: {'IfNoneMatch': '*'} or {'IfMatch': an ETag}.

        Raises ConditionFailed (also after a first try that was applied but not acknowledged) and NoConditions.
        """
        call = {"Bucket": self.bucket, "Key": self.key(name), "Body": data, **(condition or {})}

        def once() -> str:
            try:
                return str(self.client.put_object(**call)["ETag"])
            except STORE_ERRORS as error:
                status, code = status_of(error)
                if condition and (status == 412 or code == "NoSuchKey"):
                    raise ConditionFailed from error
                if condition and status == 501:
                    raise NoConditions from error
                raise

        return self._request(name, once)

    def put_file(self, name: str, path: Path, entry: dict[str, Any]) -> None:
        """Store a local file and verify the upload.  entry: its manifest entry.

        Raises StorageFailure if every upload arrives damaged, WrongParameters if the file is too large.
        """
        if entry["size"] > MAX_PUT_BYTES:
            raise WrongParameters(
                f"{name}: has {entry['size']:,} bytes, an object store takes {MAX_PUT_BYTES:,} at once. "
                "Lower shard.samples_per_shard."
            )
        for _ in range(UPLOADS):
            self._request(name, lambda: self._put_file(name, path, entry))
            if self.holds({**entry, "path": name}):
                return
        raise StorageFailure(f"{self.where(name)}: arrived damaged {UPLOADS} times. Check store and network.")

    def _put_file(self, name: str, path: Path, entry: dict[str, Any]) -> None:
        checksum = {"ChecksumSHA256": _base64(entry["sha256"])}
        if self.client.meta.config.request_checksum_calculation == "when_required":
            checksum = {"ContentMD5": _base64(entry["md5"])} if "md5" in entry else {}
        with open(path, "rb") as file:
            self.client.put_object(
                Bucket=self.bucket, Key=self.key(name), Body=file, ContentLength=entry["size"], **checksum
            )

    def holds(self, entry: dict[str, Any]) -> bool:
        """Whether the object of a manifest entry exists with that size and content.

        It is read back only if the store has no checksum of it.
        """
        head = self.head(entry["path"])
        if head is None or head["ContentLength"] != entry["size"]:
            return False
        etag = head["ETag"].strip('"')
        if etag == entry.get("md5"):
            return True
        # with SSE-KMS or SSE-C the ETag only looks like an MD5; otherwise one that differs means other content
        encrypted = head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head
        checksum = head.get("ChecksumSHA256", "")
        if checksum and (encrypted or "md5" not in entry or not MD5.fullmatch(etag)):
            return bool(checksum == _base64(entry["sha256"]))
        digest = hashlib.sha256()
        for chunk in self.stream(entry["path"], entry["size"]):
            digest.update(chunk)
        return bool(digest.hexdigest() == entry["sha256"])

    def names(self) -> list[str]:
        """Names of the objects directly below the prefix, sorted."""
        return self._list("Contents", "Key")

    def folders(self) -> list[str]:
        """First parts of the names of all objects farther below, sorted."""
        return [name.rstrip("/") for name in self._list("CommonPrefixes", "Prefix")]

    def _list(self, kind: str, field: str) -> list[str]:
        below, found = self.key(""), []
        call = {"Bucket": self.bucket, "Prefix": below, "Delimiter": "/"}
        while True:
            page = self._request("", lambda: self.client.list_objects_v2(**call))
            found += [item[field].removeprefix(below) for item in page.get(kind, [])]
            if not page.get("IsTruncated"):
                return sorted(name for name in found if name)
            call["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, name: str) -> None:
        """Remove an object, if it exists."""
        with contextlib.suppress(Refused):
            self._request(name, lambda: self.client.delete_object(Bucket=self.bucket, Key=self.key(name)))


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()
