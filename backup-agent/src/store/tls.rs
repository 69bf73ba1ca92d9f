//! TLS: whom it trusts, and what its errors mean. The Mozilla roots are built in, as the image has no certificate store of
//! its own; an operator's authorities come beside them.

use std::sync::Arc;

use rustls::{
    AlertDescription, CertificateError, ClientConfig, Error, RootCertStore,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, pem::PemObject},
};

/// The certificates of a PEM file, or what is wrong with it.
pub fn authorities(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| format!("it is not PEM: {error:?}"))?;
    if found.is_empty() {
        return Err("it has no certificate: BEGIN CERTIFICATE, in PEM, is missing".to_owned());
    }
    match RootCertStore::empty().add_parsable_certificates(found.iter().cloned()) {
        (0, _) => Err("none of its certificates can be read".to_owned()),
        _ => Ok(found),
    }
}

/// What a connection needs to know.
pub fn client(authorities: &[CertificateDer<'static>]) -> ClientConfig {
    let mut roots = RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    roots.add_parsable_certificates(authorities.iter().cloned());
    ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring knows the versions that rustls has")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// What is wrong and what helps, where trying again does not.
pub fn explain(error: &Error) -> Option<String> {
    use CertificateError as Reason;

    let (problem, remedy) = match error {
        Error::InvalidCertificate(reason) => match reason {
            Reason::UnknownIssuer => (
                "its certificate is of an authority that is not known here",
                "name a file with the authority's certificate in RUNTIME_CA_FILE",
            ),
            Reason::Expired | Reason::ExpiredContext { .. } => (
                "its certificate has expired",
                "renew it, or set this machine's clock",
            ),
            Reason::NotValidYet | Reason::NotValidYetContext { .. } => (
                "its certificate is not valid yet",
                "set this machine's clock",
            ),
            Reason::NotValidForName | Reason::NotValidForNameContext { .. } => (
                "its certificate is for another name",
                "check the host in RUNTIME_S3_ENDPOINT; a bucket with dots in its name belongs into the path",
            ),
            Reason::Revoked => ("its certificate has been revoked", "renew it"),
            other if format!("{other:?}").contains("CaUsedAsEndEntity") => (
                "it shows the certificate of an authority as its own",
                "give it one that is no authority's (CA:FALSE), and name its issuer in RUNTIME_CA_FILE",
            ),
            _ => return Some(format!("{error}; renew the certificate of that server")),
        },
        Error::InvalidMessage(_) => (
            "it does not speak TLS",
            "check RUNTIME_S3_ENDPOINT: http:// where there is no TLS, or another port",
        ),
        Error::PeerIncompatible(_) | Error::AlertReceived(AlertDescription::ProtocolVersion) => (
            "it speaks an older TLS than 1.2 only",
            "let it speak a newer one, or put a server in front of it that does",
        ),
        Error::AlertReceived(AlertDescription::UnrecognisedName) => (
            "it does not know itself by that name",
            "check the host in RUNTIME_S3_ENDPOINT",
        ),
        _ => return None,
    };
    Some(format!("{problem}; {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_certificate_is_no_authority() {
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let broken = "-----BEGIN CERTIFICATE-----\n%%%%\n-----END CERTIFICATE-----\n";
        let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for (text, want) in [
            ("", "no certificate"),
            ("certificate", "no certificate"),
            (key, "no certificate"),
            (garbage, "none of its certificates"),
            (broken, "not PEM"),
        ] {
            let problem = authorities(text.as_bytes()).expect_err(text);
            assert!(problem.contains(want), "{problem}");
        }
    }
}
