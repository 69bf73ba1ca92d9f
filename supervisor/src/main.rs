//! The program: all of it is in the library, where fuzz targets reach its readers too.

use std::process::ExitCode;

fn main() -> ExitCode {
    supervisor::main()
}
