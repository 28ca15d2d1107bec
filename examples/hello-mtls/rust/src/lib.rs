//! The files of the volume, which both programs read for each connection.

use rustls::pki_types::{pem::PemObject, CertificateDer, PrivateKeyDer};
use rustls::RootCertStore;
use std::{error::Error, fs, sync::Arc};

pub type Failure = Box<dyn Error>;

pub struct Files {
    pub certificates: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub roots: Arc<RootCertStore>,
}

/// Reads the newest files. One file contains the key and its certificate, so they always match.
pub fn newest() -> Result<Files, Failure> {
    let pem = fs::read("/var/run/tls/site.pem")?;
    let certificates = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&pem)?;
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter("/var/run/tls/root.crt")? {
        roots.add(root?)?;
    }
    Ok(Files { certificates, key, roots: Arc::new(roots) })
}
