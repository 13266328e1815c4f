"""s3:// for Orbax, which hands TensorStore gs:// and paths alone (0.12.8), though TensorStore reaches both."""

import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from jaxllm.errors import UserError

S3 = "s3://"


def teach_orbax_s3() -> None:
    """From now on Orbax takes s3:// where it takes gs://. Credentials and region are those of TensorStore's driver.

    Raises:
      UserError: an Orbax that is built otherwise.
    """
    if getattr(gcs_utils.get_kvstore_for_gcs, "takes_s3", False):
        return
    try:
        uses_driver, normalized = tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path
        of_gs = gcs_utils.get_kvstore_for_gcs
    except AttributeError as error:
        raise UserError(f"this version of orbax-checkpoint writes no s3:// ({error}). 0.12.8 does.") from None

    def key_value_store(path: str) -> dict[str, Any]:
        return _key_value_store(path) if path.startswith(S3) else of_gs(path)

    key_value_store.takes_s3 = True
    gcs_utils.get_kvstore_for_gcs = key_value_store
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(S3) or uses_driver(path)
    tensorstore_utils._normalize_path = lambda path: normalized(path).replace("s3:/", S3)


def _key_value_store(path: str) -> dict[str, Any]:
    """TensorStore's spec of a path; the endpoint is that which other clients of S3 take."""
    bucket, _, key = path.removeprefix(S3).partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:  # of another store than Amazon's, whose regions cannot be asked for
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec
