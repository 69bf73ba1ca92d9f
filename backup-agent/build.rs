//! Links the released agent without tables for unwinding the stack: a panic aborts it, and they are a tenth of its size.

use std::env::var;

fn main() {
    println!("cargo::rerun-if-changed=no-unwind-tables.ld");
    let is = |name: &str, value: &str| var(name).is_ok_and(|found| found == value);
    // A profile of `release`, in which a panic aborts. The script is in the language of GNU ld, which links static programs.
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_ENV", "musl") {
        let folder = var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!(
            "cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr,-T,{folder}/no-unwind-tables.ld"
        );
    }
}
