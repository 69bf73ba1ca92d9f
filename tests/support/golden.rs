//! Files that freeze what others rely on. `UPDATE_GOLDEN=1` writes them anew, for a reviewer to read the difference.

use std::path::Path;

/// Compares with `tests/golden/NAME`.
pub fn compare(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).expect("can write the golden file");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == text,
        "{name} has changed; if that is meant, run with UPDATE_GOLDEN=1\n--- golden\n{golden}\n--- now\n{text}"
    );
}
