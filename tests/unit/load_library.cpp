// Loads the plugin library named on its command line and prints how many creators it has and what it says of itself:
// for machines whose Python is not at hand.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        std::puts(dlerror());
        return 1;
    }
    auto const describe = reinterpret_cast<char const* (*)()>(dlsym(library, "nemo_plugin_describe"));
    auto const creators = reinterpret_cast<void* (*)(int32_t*)>(dlsym(library, "getCreators"));
    if (!describe || !creators) return 2;
    int32_t count = 0;
    creators(&count);
    std::printf("%d\n%s\n", count, describe());
    return 0;
}
