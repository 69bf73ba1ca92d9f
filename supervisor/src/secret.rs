//! Secrets: never printed, compared in constant time, and taken out of text that others wrote.

use std::fmt;

use subtle::ConstantTimeEq as _;

/// Longest token that is compared; longer ones are refused in the settings.
pub const MAX_TOKEN: usize = 512;

pub const REDACTED: &str = "[redacted]";

#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The one way to the value: every use of it can be found by this name.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `guess` is this token. The time depends on how long the guess is, and on nothing that whoever makes it does
    /// not know: neither on how much of it is right nor on how long the token is.
    pub fn matches(&self, guess: &[u8]) -> bool {
        let (token, padded_guess) = (padded(self.0.as_bytes()), padded(guess));
        // In words: an eighth of the comparisons.
        let pairs = token.as_chunks().0.iter().zip(padded_guess.as_chunks().0);
        let pairs = pairs.take(guess.len().div_ceil(size_of::<u64>()));
        let same_length = (self.0.len() as u64).ct_eq(&(guess.len() as u64));
        let same = pairs.fold(same_length, |same, (token, guess)| {
            same & u64::from_ne_bytes(*token).ct_eq(&u64::from_ne_bytes(*guess))
        });
        same.into()
    }
}

fn padded(bytes: &[u8]) -> [u8; MAX_TOKEN] {
    let mut block = [0; MAX_TOKEN];
    let length = bytes.len().min(MAX_TOKEN);
    block[..length].copy_from_slice(&bytes[..length]);
    block
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

/// Every secret that the runtime knows.
#[derive(Clone, Debug, Default)]
pub struct Secrets(pub Vec<Secret>);

/// Longest sentence of others that is shown or logged.
const MAX_SENTENCE: usize = 1000;

impl Secrets {
    /// Text of another program without any secret in it, cut to so many bytes.
    pub fn take_out(&self, text: &str, most: usize) -> String {
        let mut clean = self.without(text);
        clean.truncate(clean.floor_char_boundary(most));
        clean
    }

    /// Text of another program as one bounded line without any secret in it.
    pub fn scrub(&self, text: &str) -> String {
        self.without(text)
            .trim()
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(MAX_SENTENCE)
            .collect()
    }

    fn without(&self, text: &str) -> String {
        let mut clean = text.to_owned();
        for secret in &self.0 {
            if !secret.0.is_empty() {
                clean = clean.replace(&secret.0, REDACTED);
            }
        }
        clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_matches_itself_only() {
        let token = Secret::new("abcdefgh".into());
        assert!(token.matches(b"abcdefgh"));
        for guess in ["", "abcdefg", "abcdefgi", "abcdefghi", "abcdefgh\0"] {
            assert!(!token.matches(guess.as_bytes()), "{guess:?}");
        }
        assert!(!token.matches(&[b'a'; 2 * MAX_TOKEN]));
        let longest = Secret::new("x".repeat(MAX_TOKEN));
        assert!(!longest.matches(&[b'x'; MAX_TOKEN + 1]));
    }

    #[test]
    fn a_guess_that_is_wrong_in_one_byte_anywhere_is_wrong() {
        for length in 1..=24 {
            let token = Secret::new("x".repeat(length));
            assert!(token.matches(&vec![b'x'; length]));
            for at in 0..length {
                let mut guess = vec![b'x'; length];
                guess[at] = b'y';
                assert!(!token.matches(&guess), "byte {at} of {length}");
            }
        }
    }

    #[test]
    fn no_secret_is_printed() {
        let secret = Secret::new("hunter2".into());
        assert_eq!(format!("{secret:?}"), REDACTED);
        let secrets = Secrets(vec![secret]);
        assert_eq!(
            secrets.scrub("key hunter2\nrefused\n"),
            "key [redacted] refused"
        );
    }
}
