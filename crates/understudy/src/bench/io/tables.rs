//! Not measured yet.

use std::path::Path;

use super::Options;
use crate::bench::figure::Section;
use crate::bench::stage::Material;

/// Measures it.
pub(super) fn run(
    _dir: &Path,
    _material: &Material,
    _options: &Options,
) -> anyhow::Result<Section> {
    anyhow::bail!("not measured yet")
}
