package opi

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	"github.com/thaw-project/thaw/kind"
)

// The collections of resources. A name is the collection, a slash and the id; resources
// within others have that name before theirs (aip.dev/122).
const (
	subsystems       = "nvmeSubsystems"
	controllers      = "nvmeControllers"
	nvmeNamespaces   = "nvmeNamespaces"
	remotes          = "nvmeRemoteControllers"
	paths            = "nvmePaths"
	remoteNamespaces = "nvmeRemoteNamespaces"
	aioVolumes       = "aioVolumes"
	mallocVolumes    = "mallocVolumes"
	nullVolumes      = "nullVolumes"
	rbdVolumes       = "rbdVolumes"
	lvolStores       = "lvolStores"
	lvols            = "lvols"
)

// maxIDBytes bounds an id: the longest is an NQN, 223 bytes, each written as %XX.
const maxIDBytes = 3 * 223

// plain are the bytes that an id has as they are.
func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~:@+", c) >= 0
}

// escape makes an id of any text: other bytes become %XX.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if plain(s[i]) {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, "%%%02X", s[i])
		}
	}
	return b.String()
}

// unescape is the way back. It takes only what escape makes, so that a thing has one name.
func unescape(id string) (string, error) {
	bad := func() (string, error) {
		return "", kind.Errorf(kind.Invalid, "resource id %.100q: must be 1 to %d of A-Z a-z 0-9 - . _ ~ : @ +, others as %%XX", id, maxIDBytes)
	}
	if id == "" || len(id) > maxIDBytes {
		return bad()
	}
	var out []byte
	for i := 0; i < len(id); i++ {
		c := id[i]
		if c == '%' {
			if i+2 >= len(id) {
				return bad()
			}
			if _, err := fmt.Sscanf(id[i+1:i+3], "%02X", &c); err != nil {
				return bad()
			}
			i += 2
		}
		out = append(out, c)
	}
	if s := string(out); escape(s) == id {
		return s, nil
	}
	return bad()
}

// join makes a name: collections and texts in turn.
func join(parts ...string) string {
	for i := 1; i < len(parts); i += 2 {
		parts[i] = escape(parts[i])
	}
	return strings.Join(parts, "/")
}

// parse takes the texts out of a name of these collections.
func parse(name string, collections ...string) ([]string, error) {
	parts := strings.Split(name, "/")
	ok := len(parts) == 2*len(collections)
	for i, c := range collections {
		ok = ok && parts[2*i] == c
	}
	if !ok {
		return nil, kind.Errorf(kind.Invalid, "resource name %.100q: must be %s/{id}", name, strings.Join(collections, "/{id}/"))
	}
	texts := make([]string, len(collections))
	for i := range collections {
		var err error
		if texts[i], err = unescape(parts[2*i+1]); err != nil {
			return nil, err
		}
	}
	return texts, nil
}

// parse1 is parse for names of one collection.
func parse1(name, collection string) (string, error) {
	texts, err := parse(name, collection)
	if err != nil {
		return "", err
	}
	return texts[0], nil
}

// chosen checks an id that a caller may choose but that follows from the resource.
func chosen(id, must, what string) error {
	if id != "" && id != escape(must) {
		return kind.Errorf(kind.Invalid, "id %.100q: the bridge keeps no names of its own, so the id of %s is empty or %s", id, what, escape(must))
	}
	return nil
}

// Pages (aip.dev/158): lists are in the order of names, and a token is the last name of
// the page before.
const defaultPage, maxPage = 50, 1000

// page cuts a page out of a list that it may reorder.
func page[T any](list []T, name func(T) string, size int32, token string) (part []T, next string, err error) {
	if size < 0 {
		return nil, "", kind.Errorf(kind.Invalid, "page_size %d is negative", size)
	}
	if size == 0 {
		size = defaultPage
	}
	size = min(size, maxPage)
	last, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(token) > 4*maxIDBytes {
		return nil, "", kind.Errorf(kind.Invalid, "page_token %.40q is none of ours", token)
	}
	slices.SortFunc(list, func(a, b T) int { return strings.Compare(name(a), name(b)) })
	from, found := slices.BinarySearchFunc(list, string(last), func(e T, n string) int { return strings.Compare(name(e), n) })
	if found {
		from++
	}
	list = list[from:]
	if len(list) > int(size) {
		list = list[:size]
		next = base64.RawURLEncoding.EncodeToString([]byte(name(list[size-1])))
	}
	return list, next, nil
}
