//! What a terminal does not show: its own control sequences (ECMA-48) and characters without a width.

/// How long the control sequence at the beginning of `text` is; 0 when there is none.
pub fn sequence(text: &[u8]) -> usize {
    let (introducer, after) = match text {
        [0x1b, kind, after @ ..] => (*kind, after),
        // The same in one character: U+009B is `ESC [`.
        [0xc2, kind @ 0x80..=0x9f, after @ ..] => (kind - 0x40, after),
        [0x1b] => return 1,
        _ => return 0,
    };
    let count = |is_part: fn(&u8) -> bool| after.iter().take_while(|byte| is_part(byte)).count();
    let rest = match introducer {
        b'[' => count(|byte| (0x20..=0x3f).contains(byte)) + 1,
        // Up to its terminator, of which a part may be left, or to the end of the line.
        b']' | b'P' | b'X' | b'^' | b'_' => count(|byte| *byte >= b' '),
        0x20..=0x2f => count(|byte| (0x20..=0x2f).contains(byte)) + 1,
        _ => 0,
    };
    (text.len() - after.len() + rest).min(text.len())
}

/// Joiners, marks of direction and the like.
pub fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_told_from_text() {
        for (text, length) in [
            (&b"\x1b[31mred"[..], 5),
            (b"\x1b[1;2Kx", 6),
            (b"\x1b(Bx", 3),
            (b"\x1b]0;title\x07x", 9),
            (b"\x1bcx", 2),
            (b"\xc2\x9b2Jx", 4),
            (b"\x1b", 1),
            (b"\x1b[3", 3),
            (b"plain", 0),
            (b"\xc3\xa9", 0),
            (b"", 0),
        ] {
            assert_eq!(sequence(text), length, "{text:?}");
        }
    }
}
