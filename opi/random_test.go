package opi_test

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	opiv1 "github.com/opiproject/opi-api/storage/v1alpha1/gen/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	lvolv1 "github.com/thaw-project/thaw/api/lvol/v1"
)

// texts are what strings of random requests are made of: names that mean something, and
// some that must not.
var texts = []string{"", "m0", "s", "x", "y", sub, sub + "/nvmeControllers/tcp:127.0.0.1:4420", sub + "/nvmeNamespaces/" + uid, nqn, hostNQN, uid, nguid, "mallocVolumes/m0", "aioVolumes/m0",
	"nullVolumes/x", "rbdVolumes/x", store, "lvolStores/-", lvolName("x"), lvolName("y"), "nvmeRemoteControllers/x", "nvmeRemoteControllers/x/nvmePaths/tcp:127.0.0.1:4420",
	"nvmeRemoteControllers/x/nvmeRemoteNamespaces/xn1", "127.0.0.1", "::1", "4420", "spec.hostnqn", "name", "*", "%2F", "\x00", "../..", "/dev/null", strings.Repeat("n", 1000)}

// likely are texts that a field of a name may well have.
func likely(name string) []string {
	switch {
	case strings.HasSuffix(name, "nqn"):
		return []string{nqn, hostNQN, nqn + "2"}
	case name == "name", name == "parent", name == "volume_name_ref":
		return texts[5:24]
	case name == "traddr":
		return []string{"127.0.0.1", "::1"}
	case name == "trsvcid":
		return []string{"4420"}
	case name == "uuid", name == "nguid":
		return []string{"", uid, nguid}
	case strings.HasSuffix(name, "_id"):
		return []string{"", "m0", "s", "x", "y"}
	}
	return texts
}

// fill gives a message random fields.
func fill(r *rand.Rand, m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if r.IntN(4) == 0 {
			continue
		}
		switch {
		case f.IsMap():
		case f.IsList():
			if f.Kind() == protoreflect.StringKind {
				m.Mutable(f).List().Append(protoreflect.ValueOfString(texts[r.IntN(len(texts))]))
			}
		case f.Message() != nil:
			if depth < 5 {
				fill(r, m.Mutable(f).Message(), depth+1)
			}
		default:
			m.Set(f, scalar(r, f))
		}
	}
}

func scalar(r *rand.Rand, f protoreflect.FieldDescriptor) protoreflect.Value {
	n := []int64{0, 0, 0, 0, 1, 3, 512, 4096, 4096, 1 << 20, -1, 1<<31 - 1, -1 << 31, 1<<63 - 1, -1 << 63}[r.IntN(15)]
	switch f.Kind() {
	case protoreflect.StringKind:
		from := texts
		if r.IntN(8) > 0 {
			from = likely(string(f.Name()))
		}
		return protoreflect.ValueOfString(from[r.IntN(len(from))])
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(texts[r.IntN(len(texts))]))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(n&1 == 1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(r.IntN(8)))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(n)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	}
	return f.Default()
}

// TestAnything calls every method with nothing, then with anything. None may take the
// bridge down, wait long, or fail in a way that has no name.
func TestAnything(t *testing.T) {
	l := start(t, nil)
	l.mallocVolume("m0")
	l.lvstore("m0")
	l.subsystem(nqn)
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed %d", s)
	r := rand.New(rand.NewPCG(s, 3))
	seen := map[codes.Code]int{}
	call := func(service protoreflect.ServiceDescriptor, m protoreflect.MethodDescriptor, filled bool) {
		t.Helper()
		in, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
		if err != nil {
			t.Fatal(err)
		}
		out, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
		if err != nil {
			t.Fatal(err)
		}
		request, answer := in.New(), out.New()
		if filled {
			fill(r, request, 0)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err = l.conn.Invoke(ctx, "/"+string(service.FullName())+"/"+string(m.Name()), request.Interface(), answer.Interface())
		code := status.Code(err)
		seen[code]++
		switch code {
		case codes.Unknown, codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
			t.Errorf("%s(%v): %v", m.FullName(), request.Interface(), err)
		}
	}
	services := []protoreflect.FileDescriptor{opiv1.File_frontend_nvme_proto, opiv1.File_backend_nvme_proto, opiv1.File_backend_aio_proto,
		opiv1.File_backend_malloc_proto, opiv1.File_backend_null_proto, lvolv1.File_lvol_v1_lvol_proto}
	for round := range 200 {
		for _, file := range services {
			for i := range file.Services().Len() {
				service := file.Services().Get(i)
				for j := range service.Methods().Len() {
					call(service, service.Methods().Get(j), round > 0)
				}
			}
		}
	}
	t.Logf("%v", seen)
	if seen[codes.OK] == 0 || seen[codes.NotFound] == 0 || seen[codes.InvalidArgument] == 0 {
		t.Errorf("the requests are too alike: %v", seen)
	}
}
