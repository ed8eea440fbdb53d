//! The server's certificate.

use std::{path::Path, sync::Arc};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig, crypto,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::Error;

/// Reads a chain of certificates, the server's own first, and its key, both in PEM.
///
/// # Errors
/// [`Error::Config`] naming the option whose file is at fault.
pub fn acceptor(certfile: &Path, keyfile: &Path) -> Result<TlsAcceptor, Error> {
    let fail = |flag: &'static str, path: &Path| {
        let path = path.display().to_string();
        move |error: &dyn std::fmt::Display| Error::config(flag, format!("{path}: {error}"))
    };
    let (bad_certificate, bad_key) = (fail("--ssl-certfile", certfile), fail("--ssl-keyfile", keyfile));
    let chain = CertificateDer::pem_file_iter(certfile).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| bad_certificate(&error))?;
    if chain.is_empty() {
        return Err(bad_certificate(&"there is no certificate in PEM in this file"));
    }
    let key = PrivateKeyDer::from_pem_file(keyfile).map_err(|error| bad_key(&error))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| bad_certificate(&error))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| bad_key(&error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
