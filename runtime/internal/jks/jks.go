// Package jks writes Java's own kind of trust store, which every Java reads by itself.
//
// The format is that of sun.security.provider.JavaKeyStore: a magic number, a version, the entries, and a digest of all
// that with the password in front. A trust store holds nothing secret, so the password only finds damage.
package jks

import (
	"crypto/sha1" // the format's only digest
	"encoding/binary"
	"strconv"
	"time"
	"unicode/utf16"
)

const (
	magic            = 0xfeedfeed
	version          = 2
	tagTrusted       = 2
	certificateType  = "X.509"
	whitener         = "Mighty Aphrodite"
	digestPartsBytes = 2
)

// Password is Java's usual one, for those who give one. Without one Java does not look at the digest.
const Password = "changeit"

// Trusting is a store that trusts the certificates, which are in DER, since made.
func Trusting(made time.Time, certificates ...[]byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, uint32(len(certificates)))
	for i, certificate := range certificates {
		b = binary.BigEndian.AppendUint32(b, tagTrusted)
		b = text(b, "kalium-"+strconv.Itoa(i))
		b = binary.BigEndian.AppendUint64(b, uint64(made.UnixMilli()))
		b = text(b, certificateType)
		b = binary.BigEndian.AppendUint32(b, uint32(len(certificate)))
		b = append(b, certificate...)
	}
	digest := sha1.New()
	for _, unit := range utf16.Encode([]rune(Password)) {
		digest.Write(binary.BigEndian.AppendUint16(make([]byte, 0, digestPartsBytes), unit))
	}
	digest.Write([]byte(whitener))
	digest.Write(b)
	return digest.Sum(b)
}

// text appends a string of ASCII as java.io.DataOutput writes it.
func text(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}
