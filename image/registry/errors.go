package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"unicode"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

// maxMessageBytes bounds how much of a registry's own words an error repeats.
const maxMessageBytes = 300

// Explain wraps an error from a registry or the connection to it: one line of
// bounded, printable text that says what was being done, without credentials, and
// a kind.
func Explain(what string, err error) error {
	if err == nil {
		return nil
	}
	if k := kind.Of(err); k != "" {
		var errno interface{ Temporary() bool }
		if !errors.As(err, &errno) { // marked by us, not a bare errno from below
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	var status *transport.Error
	var uerr *url.Error
	var neterr net.Error
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return kind.Errorf(kind.Canceled, "%s: %w", what, context.Canceled)
	case errors.As(err, &status):
		return explainStatus(what, status)
	case errors.As(err, &uerr):
		// url.Error prints the whole URL, and the query of a redirected blob's URL is
		// its credential.
		k := kind.Unavailable
		if own := kind.Of(uerr.Err); own == kind.Denied {
			k = own
		}
		hint := ""
		var certificate *tls.CertificateVerificationError
		switch {
		case errors.Is(uerr, unix.ECONNREFUSED):
			hint = ": nothing listens there: check the address, or start the registry"
		case errors.Is(uerr, http.ErrSchemeMismatch):
			k, hint = kind.Denied, ": the registry has no TLS: allow that with --plain-http"
		case errors.As(uerr, &certificate):
			k, hint = kind.Denied, ": name the certificate of its authority with --ca-file"
		}
		return kind.Errorf(k, "%s: %s %s: %s%s", what, strings.ToUpper(uerr.Op), bare(uerr.URL), printable(withoutQuery(uerr.Err.Error(), uerr.URL)), hint)
	case errors.Is(err, io.ErrUnexpectedEOF):
		// Kept for who counts: the same end time and again is no network's.
		return kind.Errorf(kind.Unavailable, "%s: %w", what, io.ErrUnexpectedEOF)
	case errors.As(err, &neterr), errors.Is(err, io.EOF):
		return kind.Errorf(kind.Unavailable, "%s: %s", what, printable(err.Error()))
	}
	// What a registry says that makes no sense, or leads where it must not.
	return kind.Errorf(kind.Invalid, "%s: %s", what, printable(err.Error()))
}

func explainStatus(what string, status *transport.Error) error {
	var codes []string
	for _, d := range status.Errors {
		codes = append(codes, string(d.Code)+" "+d.Message)
	}
	said := http.StatusText(status.StatusCode)
	if len(codes) > 0 {
		said += ": " + strings.Join(codes, "; ")
	}
	said = printable(said)
	switch code := status.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return kind.Errorf(kind.Denied, "%s: the registry refused the credentials, or there are none (%d %s): log in with 'docker login', or name the directory of config.json with --docker-config", what, code, said)
	case code == http.StatusNotFound:
		return kind.Errorf(kind.NotFound, "%s: the registry does not have it (%d %s): check the name, tag and digest", what, code, said)
	case code == http.StatusTooManyRequests, code >= 500:
		return kind.Errorf(kind.Unavailable, "%s: the registry failed (%d %s)", what, code, said)
	case code == http.StatusRequestedRangeNotSatisfiable:
		return kind.Errorf(kind.Corrupt, "%s: the registry has fewer bytes than the manifest says (%d)", what, code)
	default:
		return kind.Errorf(kind.Invalid, "%s: the registry answered %d %s", what, code, said)
	}
}

func bare(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "the registry"
	}
	return u.Scheme + "://" + u.Host + u.Path
}

func withoutQuery(message, raw string) string {
	if _, query, ok := strings.Cut(raw, "?"); ok && query != "" {
		return strings.ReplaceAll(message, query, "...")
	}
	return message
}

// query is that of a URL somewhere in a text.
var query = regexp.MustCompile(`(://[^\s?"']*\?)[^\s"'\]]+`)

// printable makes text of unknown origin fit for a terminal and a log line: the query
// of a URL may be a credential.
func printable(s string) string {
	s = query.ReplaceAllString(s, "$1...")
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	if len(s) > maxMessageBytes {
		s = strings.ToValidUTF8(s[:maxMessageBytes], "") + "..."
	}
	return s
}
