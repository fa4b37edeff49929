package card

import (
	"fmt"
	"strconv"
	"strings"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/kind"
)

// Function is a PCIe function of the card.
type Function struct {
	Port     uint16
	Physical uint16
	Virtual  uint16 // from 1; 0 is the physical function itself
}

// String is port:physical:virtual, as in configurations and in what hosts are told.
func (f Function) String() string { return fmt.Sprintf("%d:%d:%d", f.Port, f.Physical, f.Virtual) }

// ParseFunction is the way back from String; the error is kind.Invalid.
func ParseFunction(s string) (f Function, err error) {
	parts := strings.Split(s, ":")
	if len(parts) == 3 {
		for i, into := range []*uint16{&f.Port, &f.Physical, &f.Virtual} {
			n, perr := strconv.ParseUint(parts[i], 10, 16)
			if perr != nil {
				err = perr
			}
			*into = uint16(n)
		}
	}
	if err != nil || f.String() != s {
		return Function{}, kind.Errorf(kind.Invalid, "PCIe function %.40q: must be port:physical:virtual, as 0:1:2", s)
	}
	return f, nil
}

// MarshalText and UnmarshalText make a record's functions text.
func (f Function) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText is ParseFunction.
func (f *Function) UnmarshalText(text []byte) (err error) {
	*f, err = ParseFunction(string(text))
	return err
}

func (f Function) proto() *attacherv1.PcieFunction {
	return &attacherv1.PcieFunction{Port: uint32(f.Port), PhysicalFunction: uint32(f.Physical), VirtualFunction: uint32(f.Virtual)}
}
